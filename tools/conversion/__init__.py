"""The parts of `mvssl-convert`: what it reads, how it checks images, how it writes shards."""
