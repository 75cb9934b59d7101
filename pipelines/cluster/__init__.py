"""All use of Ray except the search in `stages.tune`; what the workers compute is in `tasks`."""
