"""What every test may use."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's library: no test reaches for a network

pytest_plugins = ["tests.postgres"]
