"""Room one: pages, tables, folders and tars of the outside world come in, `TextImagePair`s or reasons go out."""
