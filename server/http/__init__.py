"""HTTP itself: its protocol, heads and bodies, and how routes and pages are described and sent."""
