from slipstream.server.cli import main

main()
