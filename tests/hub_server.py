"""A Hub on 127.0.0.1 for the real, unmodified huggingface_hub client."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_secret"


class HubServer(ThreadingHTTPServer):
    """Repositories in memory, a log of what was asked, and faults on demand.

    Attributes:
        repos: name -> {"private", "gated", "refs": {branch: commit}, "commits": {commit: {path: bytes}}}.
        log: (method, path, Range header) of every request.
        cut: how many downloads of large files to break off in the middle.
        corrupt: whether to change a byte of large files.
        refuse_commits: how many commits to refuse.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.blobs, self.log = {}, {}, []
        self.cut = self.refuse_commits = 0
        self.corrupt = False
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def add(self, repo, files, branch="main", **flags):
        """Commits files; returns the commit."""
        entry = self.repos.setdefault(repo, {"private": False, "gated": False, "refs": {}, "commits": {}})
        entry.update(flags)
        tree = {**entry["commits"].get(entry["refs"].get(branch), {}), **files}
        commit = hashlib.sha1(f"{repo} {len(entry['commits'])}".encode()).hexdigest()
        entry["commits"][commit] = tree
        entry["refs"][branch] = commit
        return commit

    def asked(self, method, part):
        return [entry for entry in self.log if entry[0] == method and part in entry[1]]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status=200, content=b"", **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        headers = {"Content-Length": str(len(body)), **{key.replace("_", "-"): v for key, v in headers.items()}}
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, code, status=404):
        self.reply(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    def handle_request(self):
        server, method = self.server, self.command
        path = self.path.partition("?")[0].strip("/")
        server.log.append((method, "/" + path, self.headers.get("Range")))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        words = path.split("/")
        if words[0] == "blobs":
            return self.blob(words[1], body)
        if path == "api/repos/create":
            return self.create(json.loads(body))
        if path == "api/validate-yaml":
            return self.reply(200, {"errors": [], "warnings": []})
        if words[:2] == ["api", "models"]:
            repo, what = "/".join(words[2:4]), words[4:]
        elif "resolve" in words:
            repo, what = "/".join(words[:2]), words[2:]
        else:
            repo, what = "/".join(words[:2]).removesuffix(".git"), words[2:]
        entry = server.repos.get(repo)
        if entry is None or (entry["private"] and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            return self.refuse("RepoNotFound")
        if not what:
            return self.reply(200, {"id": repo, "private": entry["private"]})
        if what[0] == "resolve":
            return self.resolve(entry, what[1], "/".join(what[2:]))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.reply(401, {"error": "log in to write"})
        if what[0] == "branch":
            entry["refs"].setdefault(what[1], entry["refs"].get("main"))
            return self.reply(200, {})
        if what[0] == "preupload":
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                for f in json.loads(body)["files"]
            ]
            return self.reply(200, {"files": [{**mode, "shouldIgnore": False} for mode in modes]})
        if what[:3] == ["info", "lfs", "objects"]:
            return self.batch(json.loads(body))
        if what[0] == "commit":
            return self.commit(repo, what[1], [json.loads(line) for line in body.splitlines()])
        return self.refuse("Unknown")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def create(self, wanted):
        repo = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.reply(401, {"error": "log in to write"})
        status = 409 if repo in self.server.repos else 200
        if status == 200:
            private = bool(wanted.get("private")) or wanted.get("visibility") == "private"  # older, newer clients
            self.server.add(repo, {}, private=private)
        self.reply(status, {"url": f"{self.server.url}/{repo}"})

    def resolve(self, entry, revision, name):
        if entry["gated"] and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse("GatedRepo", 403)
        commit = entry["refs"].get(revision, revision)
        if commit not in entry["commits"]:
            return self.refuse("RevisionNotFound")
        content = entry["commits"][commit].get(name)
        if content is None:
            return self.reply(404, {}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        etag = hashlib.sha256(content).hexdigest()
        headers = {"X_Repo_Commit": commit, "ETag": f'"{etag}"', "Accept_Ranges": "bytes"}
        if not name.endswith(".safetensors"):
            return self.reply(200, content, **headers)
        # Large files lie elsewhere: another host name, else the client loses the headers.
        self.server.blobs[etag] = content
        headers |= {"X_Linked_ETag": f'"{etag}"', "X_Linked_Size": str(len(content))}
        self.reply(302, **headers, Location=f"http://localhost:{self.server.server_port}/blobs/{etag}")

    def blob(self, oid, body):
        server = self.server
        if self.command == "PUT":
            server.blobs[oid] = body
            return self.reply()
        content = server.blobs[oid]
        if server.corrupt:
            content = content[:-1] + bytes([content[-1] ^ 1])
        wanted = self.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        part = content[start:]
        if self.command == "GET" and server.cut:
            server.cut -= 1
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            self.wfile.write(part[: len(part) * 7 // 8])  # the client writes 10 MB at a time
            self.close_connection = True
            return None
        if start:
            return self.reply(206, part, Content_Range=f"bytes {start}-{len(content) - 1}/{len(content)}")
        return self.reply(200, part)

    def batch(self, wanted):
        objects = []
        for item in wanted["objects"]:
            new = item["oid"] not in self.server.blobs
            upload = {"upload": {"href": f"{self.server.url}/blobs/{item['oid']}", "header": {}}}
            objects.append({**item, **({"actions": upload} if new else {})})
        self.reply(200, {"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")

    def commit(self, repo, branch, lines):
        server = self.server
        if server.refuse_commits:
            server.refuse_commits -= 1
            return self.reply(400, {"error": "no more today"})
        files = {}
        for line in lines:
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                files[line["value"]["path"]] = server.blobs[line["value"]["oid"]]
        commit = server.add(repo, files, branch)
        url = f"{server.url}/{repo}/commit/{commit}"
        return self.reply(200, {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})
