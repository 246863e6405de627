"""Raw parallel text -> checked -> clean -> subwords -> binary. The commands are in `xmoe prepare`."""
