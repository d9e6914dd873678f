"""What a pass is, pipelines of them, their proofs, journal and resuming."""
