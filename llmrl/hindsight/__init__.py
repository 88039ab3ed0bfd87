"""Offline RL for dialogue agents: dialogues, value heads and their losses, environments with exact optima."""
