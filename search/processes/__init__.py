"""Processes that trials run in: the template they are forked from, the wire to it, devices and slots."""
