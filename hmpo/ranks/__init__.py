"""Several processes that train one policy: the whole batch on each, its work dealt out."""
