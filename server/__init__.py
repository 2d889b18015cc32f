if __name__ != "slipstream.server":
    raise ImportError("import this package as slipstream.server")
