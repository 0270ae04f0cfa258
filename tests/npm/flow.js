// Runs jobs by the published client and prints what it has told of each.
// node flow.js URL run COUNT one-by-one|together | node flow.js URL kill
'use strict';
const PulsarApi = require('pulsar-rest-api-client-node');

const [url, what, count, how] = process.argv.slice(2);
const api = new PulsarApi({url});

function follow(variables, started) {
  return new Promise((resolve) => {
    const job = api.createJob('site', 'production', 'run', variables);
    const events = [];
    const end = () => resolve({data: job.data, events});
    job.on('create', () => events.push('create'));
    job.on('change', () => {
      events.push('change');
      if (job.isRunning()) started(job);
    });
    job.on('success', () => { events.push('success'); end(); });
    job.on('error', (error) => { events.push('error: ' + error); end(); });
    api.runJob(job).catch(() => {});
  });
}

async function run() {
  const results = [];
  const one = (n) => follow({run: `echo out ${n}; echo err >&2; exit ${n % 2 * 3}`}, () => {});
  if (how === 'together') {
    results.push(...await Promise.all(Array.from({length: +count}, (_, n) => one(n))));
  } else {
    for (let n = 0; n < +count; n++) results.push(await one(n));
  }
  return results;
}

async function kill() {
  let asked = false;
  const result = await follow({run: 'echo begin; exec sleep 60'}, (job) => {
    if (!asked) api.killJob(job);
    asked = true;
  });
  return {...result, jobs: JSON.parse(await api.jobs())};
}

// Its socket opens by itself, and it does not say when.
setTimeout(async () => {
  const text = JSON.stringify(await (what === 'kill' ? kill() : run()));
  process.stdout.write(`${text}\n`, () => process.exit(0)); // a pipe may take it in parts
}, 1000);
