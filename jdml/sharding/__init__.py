"""Meshes, logical-axis rules, sharded creation, and a check that asked = obtained."""
