"""How one stage runs, here or in a job: command line, key, progress, exit code; no mathematics."""
