"""HTTP to the engine and back: ingest paths as raw ASGI, everything else behind them in Starlette."""
