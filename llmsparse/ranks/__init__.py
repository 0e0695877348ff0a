"""The processes of a run: who they are, which batches each takes, and how what they find becomes one result."""
