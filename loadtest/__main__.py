from slipstream.loadtest.cli import app

app(prog_name="python -m slipstream.loadtest")
