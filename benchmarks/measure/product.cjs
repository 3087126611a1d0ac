// @vladmandic/face-api under Node, as product.py is for the products in Python.
// `node product.cjs FOLDER`: node_modules lies in FOLDER.

"use strict";

const fs = require("fs");
const path = require("path");
const readline = require("readline");
const { createRequire } = require("module");

const answers = fs.createWriteStream(null, { fd: 1 });
process.stdout.write = process.stderr.write.bind(process.stderr); // what libraries print

const modules = path.join(path.resolve(process.argv[2]), "node_modules");
const need = createRequire(modules);
const { version } = need("@vladmandic/face-api/package.json");

// The package's README names two ways under Node: TensorFlow's library, and WebAssembly where that
// cannot be installed; each with the decoder of the package's demo.
async function open() {
  let faceapi, read, runs;
  if (fs.existsSync(path.join(modules, "@tensorflow", "tfjs-node"))) {
    faceapi = need("@vladmandic/face-api/dist/face-api.node.js");
    read = (bytes) => faceapi.tf.node.decodeImage(bytes, 3);
    runs = "tfjs-node";
  } else {
    const tf = need("@tensorflow/tfjs");
    const image = need("@canvas/image");
    const wasm = need("@tensorflow/tfjs-backend-wasm");
    faceapi = need("@vladmandic/face-api/dist/face-api.node-wasm.js");
    wasm.setWasmPaths(path.join(modules, "@tensorflow", "tfjs-backend-wasm", "dist", path.sep));
    await tf.setBackend("wasm");
    await tf.ready();
    read = async (bytes) => {
      const { data, width, height } = image.getImageData(await image.imageFromBuffer(bytes));
      const rgba = Int32Array.from(data);
      return tf.tidy(() => tf.tensor3d(rgba, [height, width, 4]).slice([0, 0, 0], [-1, -1, 3]));
    };
    runs = "WebAssembly";
  }
  await faceapi.nets.faceExpressionNet.loadFromDisk(
    path.join(modules, "@vladmandic", "face-api", "model"));
  return { faceapi, read, runs };
}

async function main() {
  const { faceapi, read, runs } = await open();
  const classes = Object.keys(new faceapi.FaceExpressions(new Array(7).fill(0)));
  for await (const line of readline.createInterface({ input: process.stdin })) {
    const labels = [], ns = [];
    const cpu = process.cpuUsage();
    for (const file of JSON.parse(line).pictures) {
      const start = process.hrtime.bigint();
      const pixels = await read(fs.readFileSync(file));
      const expressions = await faceapi.recognizeFaceExpressions(pixels);
      pixels.dispose();
      labels.push(expressions.asSortedArray()[0].expression);
      ns.push(Number(process.hrtime.bigint() - start));
    }
    const { user, system } = process.cpuUsage(cpu);
    const own = { labels, ns, cpu_ns: 1000 * (user + system) };
    answers.write(JSON.stringify({ ...own, classes, version: `${version}, ${runs}` }) + "\n");
  }
}

main();
