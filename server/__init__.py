if __name__ != "slipstream.server":
    raise ImportError("import this package as slipstream.server")

ENGINE_PROCESS = "slipstream.server.engine_process"
"""The module that an engine process runs."""
