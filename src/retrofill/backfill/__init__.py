"""The backfill client: any history read, mapped, staged, sent in order, verified. It speaks HTTP and nothing else."""
