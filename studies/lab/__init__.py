"""What the studies share: experiments, the laboratory that carries them out and keeps records, probes, pages."""
