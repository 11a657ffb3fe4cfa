// A steered text as it is generated, from the .proto files: npm install, then node stream.js
"use strict";

const path = require("path");
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const protos = process.env.STEER_PROTOS || path.join(__dirname, "..", "..", "protos");
const definition = loader.loadSync("steering/v1/generation.proto", {
  includeDirs: [protos],
  keepCase: true,
  defaults: true,
  longs: String, // seeds have 64 bits
  enums: String,
  oneofs: true,
});
const { GenerationService } = grpc.loadPackageDefinition(definition).steering.v1;
const client = new GenerationService(
  process.env.STEER_TARGET || "127.0.0.1:50051",
  grpc.credentials.createInsecure(),
);

const call = client.GenerateStream(
  {
    prompt: { text: "The view from the window was" },
    operators: [{ name: "ocean", strength: 0.4 }],
    sampling: { max_tokens: 24 },
  },
  { deadline: Date.now() + 120_000 },
);
call.on("data", (event) => {
  if (event.event === "delta") process.stdout.write(event.delta.text);
  if (event.event === "finished") {
    for (const receipt of event.finished.receipts) {
      console.log(`\n${receipt.operator} ${receipt.digest}: λ ${(2 * receipt.mean_dose).toFixed(3)}`);
    }
  }
});
call.on("error", (error) => {
  console.error(error.message);
  process.exitCode = 1;
});
call.on("end", () => client.close());
