if __name__ != "slipstream.drafter":
    raise ImportError("import this package as slipstream.drafter")
