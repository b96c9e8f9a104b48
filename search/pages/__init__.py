"""The report as one page of HTML: its panels, what they are drawn from, and how they look."""
