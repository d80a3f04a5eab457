"""What the scripts of tables and figures share: runs, how they are made, and how they are shown."""
