"""`python envs.py serve-search`: the retriever of Search-QA as a program."""

import argparse
import sys

from lib.generated import bundled_corpus
from lib.retrieval import read_corpus, search_server


def main(argv=None):
    """`python envs.py serve-search`: the bundled passages, or those of a file, behind POST /retrieve."""
    parser = argparse.ArgumentParser(description="Serves Search-QA's retriever: BM25 over passages, POST /retrieve.")
    command = parser.add_subparsers(dest="command", required=True).add_parser(
        "serve-search", help="serve passages until Ctrl-C", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    command.add_argument("--host", default="127.0.0.1", help="address to listen on")
    command.add_argument("--port", type=int, default=8000, help="port to listen on, 0 for any free one")
    command.add_argument("--corpus", help='JSONL file of {"id", "contents"}; without it the bundled facts')
    command.add_argument("--topk", type=int, default=3, help="passages for a request that asks for no number")
    args = parser.parse_args(argv)
    try:
        corpus = read_corpus(args.corpus) if args.corpus else bundled_corpus()
        server = search_server(corpus, args.host, args.port, args.topk)
    except (OSError, ValueError, OverflowError) as error:
        sys.exit(f"error: cannot serve on {args.host}:{args.port}: {error}")
    with server:
        print(f"Serving at {server.url}, until Ctrl-C.", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
