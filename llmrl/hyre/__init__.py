"""HyRe: one ensemble of reward heads, fitted to a user or a domain by reweighting its heads with a few labels."""
