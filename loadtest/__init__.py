if __name__ != "slipstream.loadtest":
    raise ImportError("import this package as slipstream.loadtest")
