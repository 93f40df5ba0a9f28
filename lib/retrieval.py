"""Search: BM25 over products and passages, and the retriever of Search-QA as a client and as a server.

BM25 has the constants of Anserini (k1 0.9, b 0.4) and Lucene's idf, with an analyser of our own. The protocol is that
of Search-R1's retrieval server: POST /retrieve.
"""
import functools
import http.client
import http.server
import json
import re
import sys
import time
import unicodedata
import urllib.error
import urllib.request
from array import array
from collections import Counter
from typing import NamedTuple

import numpy as np

from lib.official import read_jsonl

HITS = 50                                # results of a WebShop search, as in the original
RETRIEVER_TIMEOUT = 30.0                 # seconds for one try
RETRIEVER_TRIES = 3                      # on a refused connection, a time-out or a status of 500 and above
RETRIEVER_PAUSE = 1.0                    # seconds before the second try, twice as many before the third
REQUEST_LIMIT = 1 << 20                  # bytes of a request that the server reads

STOP_WORDS = frozenset({
    "a", "an", "and", "are", "as", "at", "be", "but", "by", "for", "if", "in", "into", "is", "it", "no", "not", "of",
    "on", "or", "s", "such", "t", "that", "the", "their", "then", "there", "these", "they", "this", "to", "was", "will",
    "with"})


# ---------------------------------------------------------------------------------------------------------------------
# BM25
# ---------------------------------------------------------------------------------------------------------------------

HAN = "\u3005-\u3007\u3041-\u309f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"   # and Hiragana


@functools.cache
def word_pattern():
    """What a word is beyond ASCII, as in Lucene's StandardTokenizer: Han and Hiragana one by one, others in runs.

    Combining marks and joiners belong to the letter before them; \\w has neither. The table takes 0.1 s, once.
    """
    marks = "".join(map(chr, (code for code in range(0x300, sys.maxunicode + 1)
                              if unicodedata.category(chr(code))[0] == "M"))) + "\u200c\u200d"
    return re.compile(f"[{HAN}]|[^\\W_{HAN}](?:[^\\W_{HAN}]|[{marks}])*")


def search_terms(text):
    """Lower-cased alphanumeric words without stop words; a plural "s" is cut, so that "lamps" finds "lamp".

    Equal texts in different Unicode forms give equal terms (NFC); Han characters are terms of their own.
    """
    text = text.lower()
    found = (re.findall(r"[^\W_]+", text) if text.isascii()
             else word_pattern().findall(unicodedata.normalize("NFC", text)))
    words = (word for word in found if word not in STOP_WORDS)
    return [word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word for word in words]


class Postings(NamedTuple):
    """An inverted index: per term the documents that hold it and what it adds to their scores.

    Term number t has the entries starts[t] to starts[t + 1] of `documents` and `weights`. The arrays of a stored index
    are memory-mapped, so that a search reads only what it needs.
    """
    ids: np.ndarray                      # document number -> identifier
    terms: dict                          # term -> its number
    starts: np.ndarray                   # [number of terms + 1] int64
    documents: np.ndarray                # [entries] int32, ascending within a term
    weights: np.ndarray                  # [entries] fp32


def build_postings(ids, texts, *, k1=0.9, b=0.4):
    """The `Postings` of `texts` under `ids`, with Lucene's idf, ln(1 + (N - df + 0.5) / (df + 0.5)).

    texts may be an iterator: no more than one is held, and 20 bytes or so for each of its different terms.
    """
    terms, numbers, counts, sizes, lengths = {}, array("i"), array("i"), array("i"), array("i")
    for text in texts:
        found = Counter(search_terms(text))
        numbers.extend([terms.setdefault(term, len(terms)) for term in found])
        counts.extend(found.values())
        sizes.append(len(found))
        lengths.append(found.total())
    numbers, counts, sizes, lengths = (np.array(values, dtype=np.int32) for values in (numbers, counts, sizes, lengths))
    frequency = np.bincount(numbers, minlength=len(terms))
    order = np.argsort(numbers, kind="stable")       # by term, and documents in their order within one
    documents = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)[order]
    idf = np.log(1 + (len(sizes) - frequency + 0.5) / (frequency + 0.5))
    penalty = k1 * (1 - b + b * lengths / max(lengths.mean(), 1e-9))
    weights = np.empty(len(order), dtype=np.float32)
    for first in range(0, len(order), 1 << 20):      # in parts, as the fp64 between would take five times the memory
        part = slice(first, first + (1 << 20))
        tf = counts[order[part]]
        weights[part] = idf[numbers[order[part]]] * tf / (tf + penalty[documents[part]])
    return Postings(np.array(list(ids)), terms, np.append(0, np.cumsum(frequency)), documents, weights)


def save_postings(postings, folder):
    """Writes all of an index except its ids."""
    for name in ("starts", "documents", "weights"):
        np.save(folder / f"search_{name}.npy", getattr(postings, name))
    (folder / "search_terms.txt").write_text("\n".join(postings.terms), encoding="utf-8")


def load_postings(folder, ids):
    """The `Postings` that `save_postings` wrote, memory-mapped."""
    terms = (folder / "search_terms.txt").read_text(encoding="utf-8").split("\n")
    arrays = [np.load(folder / f"search_{name}.npy", mmap_mode="r") for name in ("starts", "documents", "weights")]
    return Postings(ids, {term: number for number, term in enumerate(terms)}, *arrays)


def bm25_scores(postings, query):
    """The score of every document, [number of documents] fp32; 0 where no term of the query occurs."""
    scores = np.zeros(len(postings.ids), dtype=np.float32)
    for term in search_terms(query):
        if term in postings.terms:
            number = postings.terms[term]
            entries = slice(postings.starts[number], postings.starts[number + 1])
            scores[postings.documents[entries]] += postings.weights[entries]
    return scores


def bm25(postings, query, k=HITS):
    """The identifiers of the best k documents or fewer, best first; equal scores in document order."""
    scores = bm25_scores(postings, query)
    hits = np.flatnonzero(scores)
    if len(hits) > k:                    # sort only what can be among the best k
        hits = hits[scores[hits] >= np.partition(scores[hits], -k)[-k]]
    best = hits[np.argsort(-scores[hits], kind="stable")][:k]
    return tuple(postings.ids[best].tolist())


def product_document(product):
    """The text that is indexed for a product, as in the original's search_engine/convert_product_file_format.py.

    It is the title, the description, the first bullet point and the options, lower-cased.
    """
    options = ", and ".join(f"{name}: {', '.join(values)}" for name, values in product["options"].items())
    first_bullet = product["BulletPoints"][0] if product["BulletPoints"] else ""
    return " ".join([product["Title"], product["Description"], first_bullet, options]).lower()


# ---------------------------------------------------------------------------------------------------------------------
# Passages
# ---------------------------------------------------------------------------------------------------------------------

class Corpus(NamedTuple):
    """Passages and an index over them."""
    ids: list                            # identifiers
    passages: list                       # texts, of the form "Title"\nText
    postings: Postings                   # over the passages' numbers


def make_corpus(ids, passages):
    return Corpus(list(ids), list(passages), build_postings(range(len(passages)), passages))


@functools.lru_cache(maxsize=4)
def read_corpus(path):
    """The `Corpus` in a JSONL file of {"id", "contents"} per line, the format of Search-R1's corpora."""
    ids, passages = [], []
    for where, row in read_jsonl(path):
        if not isinstance(row.get("contents"), str):
            raise ValueError(f"{where}: there is no text as contents; a line is {{\"id\": .., \"contents\": ..}}.")
        ids.append(str(row.get("id", len(ids))))
        passages.append(row["contents"])
    if not passages:
        raise ValueError(f"{path} holds no passage; give a file with at least one.")
    return make_corpus(ids, passages)


def corpus_search(corpus, query, topk):
    """The topk best passages, best first: a retriever, once the corpus is bound."""
    return [corpus.passages[number] for number in bm25(corpus.postings, query, topk)]


# ---------------------------------------------------------------------------------------------------------------------
# Client and server
# ---------------------------------------------------------------------------------------------------------------------

def result_passages(reply):
    """The passages in the JSON text of a server's answer to one query. Raises ValueError if it has another form."""
    try:
        entries = json.loads(reply)["result"][0]
        passages = [entry.get("document", entry)["contents"] for entry in entries]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError('the answer is not of the form {"result": [[{"document": {"contents": ..}}]]} '
                         f"({type(error).__name__})") from error
    if not all(isinstance(passage, str) for passage in passages):
        raise ValueError("the answer has contents that are not text")
    return passages


class Retriever:
    """Client of a server that answers POST /retrieve, ours or Search-R1's or SDAR's: (query, topk) -> passages.

    Search-R1's server reads a list under "queries", SDAR's a text under "query": the first that is understood is kept.
    Raises ConnectionError if no try succeeds and ValueError for a refusal or an answer of another form.
    """

    def __init__(self, url, *, timeout=RETRIEVER_TIMEOUT, tries=RETRIEVER_TRIES, pause=RETRIEVER_PAUSE):
        if not re.match(r"https?://[^/]", url):
            raise ValueError(f"The retriever's address must be like http://127.0.0.1:8000, not {url!r}.")
        self.url = url.rstrip("/").removesuffix("/retrieve") + "/retrieve"
        self.timeout, self.tries, self.pause = timeout, tries, pause
        self.key = None                  # of the query in a request, once one has worked

    def __call__(self, query, topk):
        forms, refusals = {"queries": [query], "query": query}, []
        for key in [self.key] if self.key else forms:
            try:
                passages = result_passages(self._post({key: forms[key], "topk": topk, "return_scores": True}))
            except ValueError as error:
                refusals.append(error)
                continue
            self.key = key
            return passages
        raise ValueError(f"{self.url}: {refusals[0]}")

    def _post(self, body):
        """The text of the answer."""
        request = urllib.request.Request(self.url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        for number in range(self.tries):
            time.sleep(self.pause * number)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    return reply.read()
            except urllib.error.HTTPError as error:
                error.close()
                if error.code < 500:
                    raise ValueError(f"the request was refused with status {error.code}") from error
                reason = f"status {error.code}"
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", None) or error
        raise ConnectionError(f"{self.url}: no answer in {self.tries} tries, the last one ended with: {reason}")


def retrieve(corpus, request, topk):
    """The server's answer to a request, both as JSON objects. Raises ValueError for a malformed request.

    request: {"queries": [texts]} or {"query": text}, maybe with "topk" and "return_scores". topk: where it gives none.
    Returns {"result": [passages per query]}, a passage being {"id", "contents"}, or with return_scores
    {"document": passage, "score": number}.
    """
    if not isinstance(request, dict) or ("queries" in request) == ("query" in request):
        raise ValueError('The request must be a JSON object with either "queries" (a list) or "query" (a text).')
    queries = request["queries"] if "queries" in request else [request["query"]]
    if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
        raise ValueError('"queries" must be a list of texts, "query" a text.')
    topk = topk if request.get("topk") is None else request["topk"]
    if type(topk) is not int or topk < 1:
        raise ValueError('"topk" must be a whole number of at least 1, or null.')
    result = []
    for query in queries:
        scores = bm25_scores(corpus.postings, query)
        found = [({"id": corpus.ids[number], "contents": corpus.passages[number]}, float(scores[number]))
                 for number in bm25(corpus.postings, query, topk)]
        result.append([{"document": document, "score": score} if request.get("return_scores") else document
                       for document, score in found])
    return {"result": result}


class RetrieveHandler(http.server.BaseHTTPRequestHandler):
    """Answers POST /retrieve by `retrieve`, with the corpus and topk of its server."""
    timeout = 30                         # seconds for a client to send its request

    def do_POST(self):
        if self.path.rstrip("/") != "/retrieve":
            return self.answer(404, {"error": f"There is nothing at {self.path}; post to /retrieve."})
        size = self.headers.get("Content-Length", "")
        if not size.isdecimal() or int(size) > REQUEST_LIMIT:
            return self.answer(413, {"error": f"A request must give its length, at most {REQUEST_LIMIT} bytes."})
        try:
            request = json.loads(self.rfile.read(int(size)))
        except (ValueError, RecursionError) as error:
            return self.answer(400, {"error": f"The request is not JSON: {error}."})
        try:
            self.answer(200, retrieve(self.server.corpus, request, self.server.topk))
        except ValueError as error:
            self.answer(400, {"error": str(error)})

    def do_GET(self):
        self.answer(405, {"error": 'Post {"queries": ["..."], "topk": 3} to /retrieve.'})

    def answer(self, status, body):
        body = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):        # a line per search of a training run would help nobody
        pass


def search_server(corpus, host="127.0.0.1", port=8000, topk=3):
    """An HTTP server, bound and not yet started, that answers POST /retrieve from `corpus`; port 0 takes a free one.

    topk: passages for a request that asks for no number. Raises ValueError for a topk below 1 and OSError or
    OverflowError for an address that cannot be bound.
    """
    if topk < 1:
        raise ValueError(f"topk must be at least 1, not {topk}")
    server = http.server.ThreadingHTTPServer((host, port), RetrieveHandler)
    server.corpus, server.topk = corpus, topk
    return server
