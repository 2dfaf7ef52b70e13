"""Thin Prefect flows around `ehr_sn`. They run with or without a Prefect server."""

import os

# Set before Prefect is imported. Without an API URL each process starts a server of its own,
# which on a busy machine takes longer than Prefect's default patience.
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")

# Set in every process that runs a flow or a task: what they write is for its owner alone.
os.umask(0o077)
