"""Other projects' interfaces, offered by shardtool: one module for each."""
