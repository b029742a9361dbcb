"""The machines: mesh and sharding rules, processes and their peers, checkpoints, digests, random keys."""
