"""Image and video files: reading them, from files, archives, shards and the web, and checking them."""
