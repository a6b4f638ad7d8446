"""Archives of pools and of trees: levels, keeping, retention, restore."""
