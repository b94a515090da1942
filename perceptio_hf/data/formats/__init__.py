"""Published files that training and benchmarks read alike: Hub tables, plain pickles, COCO, referring records."""
