"""The search loop and what it decides by: whose turn it is, when to stop a trial, when to end the search."""
