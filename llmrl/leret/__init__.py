"""LeReT: teach a language model to search by preferring the queries whose retrieval scores higher (arXiv 2410.23214)."""
