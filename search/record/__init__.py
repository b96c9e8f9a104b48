"""The durable record of a study: its journal, its folder, its lock, and mending or removing them."""
