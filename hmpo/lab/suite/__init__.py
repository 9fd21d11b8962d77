"""A suite file -> cells -> runs: many settings over many seeds, each an ordinary run folder."""
