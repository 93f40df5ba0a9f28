"""What envs.py, sdar.py and the tools build on: files that a first reading may skip."""
