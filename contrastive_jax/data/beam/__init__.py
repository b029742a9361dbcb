"""Preparing on the machines of a cluster, through Apache Beam."""
