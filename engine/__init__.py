if __name__ != "slipstream.engine":
    raise ImportError("import this package as slipstream.engine")
