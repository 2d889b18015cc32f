if __name__ != "slipstream.clients":
    raise ImportError("import this package as slipstream.clients")
