"""What is done with events: committed, sealed, recovered, queried, exported, deleted."""
