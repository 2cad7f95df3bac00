"""What is not sealed yet, and what every start needs: blocks, projects, checkpoints."""
