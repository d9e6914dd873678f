"""The one call, what it returns, and what is built on many of them: sweeps and frontiers."""
