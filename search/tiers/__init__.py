"""The rows: what ``load()`` returned, split into four tiers, checked for leaks, stored once and sealed."""
