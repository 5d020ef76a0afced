// node perfetto.js PAGE TRACE QUERY...: what Perfetto's trace processor answers, as JSON lists.
//
// PAGE is a folder of Perfetto's page. Its worker `engine_bundle.js` holds the trace processor as
// WebAssembly and speaks the protocol of trace_processor.proto, of which this is what queries need.

const fs = require("fs");
const path = require("path");
const vm = require("vm");

const [APPEND, FINISH, QUERY] = [1, 2, 3]; // TraceProcessorMethod
const [page, trace, ...queries] = process.argv.slice(2);
const read = (name) => fs.readFileSync(path.join(page, path.basename(String(name))));

function varint(number) {
  const bytes = [];
  for (; number > 127; number = Math.floor(number / 128)) bytes.push((number % 128) + 128);
  return Buffer.from([...bytes, number]);
}

const whole = (field, number) => Buffer.concat([varint(field * 8), varint(number)]);
const bytes = (field, data) => Buffer.concat([varint(field * 8 + 2), varint(data.length), data]);

function* varints(data) {
  let number = 0;
  let unit = 1;
  for (const byte of data) {
    number += (byte & 127) * unit;
    unit *= 128;
    if (byte < 128) {
      yield number;
      [number, unit] = [0, 1];
    }
  }
}

function parts(message, wanted) {
  const found = [];
  for (let at = 0; at < message.length; ) {
    const next = () => {
      const end = message.findIndex((byte, index) => index >= at && byte < 128) + 1;
      const [number] = varints(message.subarray(at, end));
      at = end;
      return number;
    };
    const tag = next();
    const first = [0, 2].includes(tag % 8) ? next() : { 1: 8, 5: 4 }[tag % 8];
    const value = tag % 8 === 0 ? first : message.subarray(at, (at += first));
    if (Math.floor(tag / 8) === wanted) found.push(value);
  }
  return found;
}

class XMLHttpRequest {
  open(method, name) {
    this.name = name;
  }
  send() {
    this.response = new Uint8Array(read(this.name)).buffer;
    this.status = 200;
  }
}

const silent = { log() {}, warn() {}, error() {} };
const worker = { console: silent, XMLHttpRequest, WebAssembly, TypeError, TextDecoder, setTimeout };
Object.assign(worker, { Uint8Array, performance, URL, WorkerGlobalScope: class {}, importScripts() {} });
Object.assign(worker, { self: worker, crypto: globalThis.crypto, location: { href: "http://page/" } });
vm.runInContext(read("engine_bundle.js").toString(), vm.createContext(worker));

let heard = null;
const port = { postMessage: (data) => heard(Buffer.from(data)) };
worker.onmessage({ data: port });

let number = 0;
function ask(method, argument = Buffer.alloc(0)) {
  const values = [];
  heard = (stream) => {
    for (const reply of parts(stream, 1)) {
      const results = [...parts(reply, 201), ...parts(reply, 203)];
      for (const error of [...parts(reply, 5), ...results.flatMap((one) => parts(one, 2))])
        if (error.length) throw new Error(String(error));
      for (const batch of results.flatMap((one) => parts(one, 3))) {
        for (const cells of parts(batch, 2)) values.push(...varints(cells));
        for (const cells of parts(batch, 5)) values.push(...String(cells).split("\0").slice(0, -1));
      }
    }
  };
  const request = Buffer.concat([whole(1, number++), whole(2, method), argument]);
  port.onmessage({ data: new Uint8Array(bytes(1, request)) });
  return values;
}

setTimeout(function start() {
  if (!port.onmessage) return setTimeout(start, 10);
  ask(APPEND, bytes(101, fs.readFileSync(trace)));
  ask(FINISH);
  const answers = queries.map((query) => ask(QUERY, bytes(103, bytes(1, Buffer.from(query)))));
  console.log(JSON.stringify(answers));
});
