// npm's mixpanel-import, unmodified but for its address. Arguments: file, address. Prints how many events it took.
const Job = require("mixpanel-import/components/job.js");
const [file, address] = process.argv.slice(2);
Object.defineProperty(Job.prototype, "url", { get: () => `${address}/import` });
const run = require("mixpanel-import");
run({ acct: "a", pass: "b", project: "1", secret: "s" }, file, {
  recordType: "event", streamFormat: "jsonl", transport: "got", recordsPerBatch: 1000, workers: 10,
  compress: false, fixData: true, logs: false, verbose: false, showProgress: false, abridged: true,
  transformFunc: (row) => ({ event: row.event_type, properties: {
    time: row.time, distinct_id: row.user_id || row.device_id, $insert_id: row.insert_id,
    ...row.event_properties } }),
}).then((found) => {
  console.log("\n" + JSON.stringify({ total: found.total, success: found.success, failed: found.failed }));
  process.exit(0);
}).catch((problem) => { console.error(problem); process.exit(1); });
