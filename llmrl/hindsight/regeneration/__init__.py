"""Hindsight regeneration (following arXiv 2411.05194): rewrite what went wrong in logged dialogues, and play on from there.

A controller that knows how a dialogue ended names the turn that was at fault and says it better; a forward model continues from
there as that user would; a reward model says what came of it. Offline RL learns from the originals and the new ones together.
Read `edits`, `validation`, `controllers`, `forward`, `rewards`, then `rounds`.
"""
