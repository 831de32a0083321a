"""What the three published recipes share: all but their networks and their numbers."""
