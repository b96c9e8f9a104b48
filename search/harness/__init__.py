"""Inside a trial's process: one job in, build, fit and predict, messages out."""
