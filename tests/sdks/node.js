// Sends events with the official SDK and prints how often its caller was told which code.
// Arguments: the server's address, the API key, how many good events, how many of one hot device.
const amplitude = require("@amplitude/analytics-node");

const [url, key, good, hot] = process.argv.slice(2);

async function main() {
  const client = amplitude.createInstance();
  await client.init(key, { serverUrl: url, flushQueueSize: 100, flushIntervalMillis: 100, logLevel: 0 }).promise;
  const told = [];
  const track = (device, number, user) =>
    told.push(
      client.track("click", { number }, {
        user_id: user,
        device_id: device,
        insert_id: `${device}-${number}`,
        time: 1700000000000 + number,
      }).promise,
    );
  for (let number = 0; number < Number(hot); number++) track("device-hot", number, "user-hot");
  for (let number = 0; number < Number(good); number++) {
    if (number === 50) track("dev", 0, "u"); // both ids are too short
    track(`device-${number % 20}`, number, `user-${number % 20}`);
  }
  const codes = {};
  for (const { code } of await Promise.all(told)) codes[code] = (codes[code] ?? 0) + 1;
  console.log(JSON.stringify(codes));
}

main();
