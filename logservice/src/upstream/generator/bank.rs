//! A bank: money moves between accounts of different tables, and their sum never changes.
//!
//! | table | rows | what happens |
//! |---|---|---|
//! | `accounts_<i>` | `accounts` each | two accounts of a pair get new balances whose sum is that of the old ones |
//! | `transfers` | the last `history` transactions (0: all) | an insert, and a delete of the oldest |
//! | `cards` | `cards` | every `rekey-every` transactions a card changes its number, its primary key |
//!
//! A card's `bio` is never sent again after its first row: an upstream leaves large unchanged values out.
//! With `ddl-every=N`, column `note` of `accounts_0` is added and dropped in turn; with `ddl=…` too, other tables come
//! and go instead (`catalog.rs`).

use event::{Column, RowOp, TableInfo, TypeKind};
use heartbeatpb::Ts;
use parking_lot::Mutex;

use super::catalog::{self, Catalog};
use super::mix;
use super::params::Params;
use super::workload::{
    Change, Filler, Moment, RowText, SchemaStep, Step, Type, Workload, bigint, column, keyed_table, text,
};

/// Balance of an account before the first transaction.
pub(super) const FIRST_BALANCE: u64 = 1000;

#[derive(Debug)]
pub(super) struct Bank {
    seed: u64,
    tables: u64,
    accounts: u64,
    history: u64,
    cards: u64,
    rekey_every: u64,
    ddl_every: u64,
    /// Kinds of schema changes; 0: column `note`.
    ddl: u64,
    /// What else there is, at the position that was asked for last.
    catalog: Mutex<Catalog>,
}

/// A transfer between the two accounts of a pair.
struct Transfer {
    from: u64,
    to: u64,
    from_balance: u64,
}

impl Bank {
    pub(super) fn new(params: &Params) -> Self {
        Self {
            seed: params.seed,
            tables: params.get("tables"),
            accounts: params.get("accounts"),
            history: params.get("history"),
            cards: params.get("cards"),
            rekey_every: params.get("rekey-every"),
            ddl_every: params.get("ddl-every"),
            ddl: params.ddl,
            catalog: Mutex::new(Catalog::new(params.seed, params.ddl)),
        }
    }

    fn transfer(&self, n: u64) -> Transfer {
        let pairs = self.tables * self.accounts / 2;
        let pair = mix(self.seed, n, 1) % pairs;
        let from_balance = mix(self.seed, n, 2) % (2 * FIRST_BALANCE + 1);
        let (one, two) = (2 * pair, 2 * pair + 1);
        if mix(self.seed, n, 3).is_multiple_of(2) {
            Transfer { from: one, to: two, from_balance }
        } else {
            Transfer { from: two, to: one, from_balance }
        }
    }

    /// Accounts are dealt to the tables in turn, so that a pair lies in two tables.
    fn place(&self, account: u64) -> (usize, u64) {
        (usize::try_from(account % self.tables).unwrap_or_default(), account / self.tables + 1)
    }

    fn account(&self, account: u64, balance: u64, n: u64, out: &mut RowText) -> usize {
        let (table, id) = self.place(account);
        out.clear().put(id).put(format_args!("owner {account}")).put(balance);
        if n == 0 {
            out.null()
        } else {
            out.put(Moment(n))
        };
        if table == 0 && self.has_note(n.checked_div(self.ddl_every).unwrap_or_default()) {
            out.put(n);
        }
        table
    }

    fn has_note(&self, ddls: u64) -> bool {
        self.ddl == 0 && !ddls.is_multiple_of(2)
    }

    /// Looks at what else there is after some schema changes.
    fn catalog<R>(&self, ddls: u64, look: impl FnOnce(&mut Catalog) -> R) -> R {
        let mut catalog = self.catalog.lock();
        catalog.go_to(ddls, || Catalog::new(self.seed, self.ddl));
        look(&mut catalog)
    }

    /// Place of the first table of the catalog.
    fn base(&self) -> usize {
        self.card_table() + 1
    }

    fn transfers(&self) -> usize {
        usize::try_from(self.tables).unwrap_or(usize::MAX)
    }

    fn card_table(&self) -> usize {
        self.transfers() + 1
    }
}

impl Workload for Bank {
    fn tables(&self) -> usize {
        self.base() + if self.ddl > 0 { catalog::SLOTS } else { 0 }
    }

    fn schemas(&self, ddls: u64) -> Vec<String> {
        if self.ddl == 0 { Vec::new() } else { self.catalog(ddls, |catalog| catalog.schemas().collect()) }
    }

    fn table(&self, table: usize, ddls: u64, version: Ts) -> Option<TableInfo> {
        if let Some(slot) = table.checked_sub(self.base()) {
            return self.catalog(ddls, |catalog| catalog.table(slot, version));
        }
        let timestamp = || Type(TypeKind::Timestamp, "timestamp without time zone", 1114);
        let id = |base: usize| i64::try_from(base).unwrap_or(i64::MAX);
        if table == self.transfers() {
            let columns: Vec<Column> = vec![
                column("id", bigint(), false),
                column("from_account", bigint(), false),
                column("to_account", bigint(), false),
                column(
                    "from_balance",
                    Type(TypeKind::Numeric { precision: Some(20), scale: 2 }, "numeric(20,2)", 1700),
                    false,
                ),
                column("at", timestamp(), false),
            ];
            return Some(keyed_table(101, "bank", "transfers".into(), version, columns));
        }
        if table == self.card_table() {
            let columns = vec![
                column("number", bigint(), false),
                column("slot", Type(TypeKind::Int32, "integer", 23), false),
                column("changed", timestamp(), true),
                column("bio", text(), true),
            ];
            return Some(keyed_table(102, "bank", "cards".into(), version, columns));
        }
        let mut columns = vec![
            column("id", bigint(), false),
            column("owner", text(), false),
            column("balance", bigint(), false),
            column("changed", timestamp(), true),
        ];
        if table == 0 && self.has_note(ddls) {
            columns.push(column("note", bigint(), true));
        }
        Some(keyed_table(id(1000 + table), "bank", format!("accounts_{table}"), version, columns))
    }

    fn first_rows(&self, table: usize) -> u64 {
        if let Some(slot) = table.checked_sub(self.base()) {
            let is_there = self.catalog(0, |catalog| catalog.table(slot, Ts::ZERO).is_some());
            if is_there { catalog::FIRST_ROWS } else { 0 }
        } else if table == self.transfers() {
            0
        } else if table == self.card_table() {
            self.cards
        } else {
            self.accounts
        }
    }

    fn first_row(&self, table: usize, number: u64, out: &mut RowText) {
        if table >= self.base() {
            Catalog::first_row(number, out);
        } else if table == self.card_table() {
            let bio = Filler { hash: mix(self.seed, number, 4), bytes: 200 };
            out.clear().put(number + 1).put(number).null().put(bio);
        } else {
            self.account(number * self.tables + table as u64, FIRST_BALANCE, 0, out);
        }
    }

    fn transaction(&self, n: u64, emit: &mut dyn FnMut(Change<'_>)) {
        let mut row = RowText::default();
        let mut old = RowText::default();
        let Transfer { from, to, from_balance } = self.transfer(n);
        for (account, balance) in [(from, from_balance), (to, 2 * FIRST_BALANCE - from_balance)] {
            let table = self.account(account, balance, n, &mut row);
            emit(Change { table, op: RowOp::Update, old: None, new: Some(&row) });
        }
        let table = self.transfers();
        row.clear().put(n).put(from).put(to).put(format_args!("{from_balance}.00")).put(Moment(n));
        emit(Change { table, op: RowOp::Insert, old: None, new: Some(&row) });
        if self.history > 0 && n > self.history {
            row.clear().put(n - self.history).unchanged().unchanged().unchanged().unchanged();
            emit(Change { table, op: RowOp::Delete, old: Some(&row), new: None });
        }
        if self.rekey_every > 0 && n.is_multiple_of(self.rekey_every) {
            let turn = n / self.rekey_every - 1;
            let (slot, version) = (turn % self.cards, turn / self.cards);
            let number = slot + 1 + self.cards * version;
            old.clear().put(number).unchanged().unchanged().unchanged();
            row.clear().put(number + self.cards).put(slot).put(Moment(n)).unchanged();
            emit(Change { table: self.card_table(), op: RowOp::Update, old: Some(&old), new: Some(&row) });
        }
        if let (Some(ddls), true) = (n.checked_div(self.ddl_every), self.ddl > 0) {
            let since = n % self.ddl_every;
            let base = self.base();
            self.catalog(ddls, |catalog| catalog.transaction(n, since, base, emit));
        }
    }

    fn ddl_every(&self) -> u64 {
        self.ddl_every
    }

    fn ddl(&self, ddl: u64) -> Option<SchemaStep> {
        if self.ddl > 0 {
            let step = self.catalog(ddl.checked_sub(1)?, Catalog::step)?;
            return Some(SchemaStep { what: step.what.behind(self.base()), ..step });
        }
        let added = self.has_note(ddl);
        let what = if added { "ADD COLUMN \"note\" bigint" } else { "DROP COLUMN \"note\"" };
        let query = format!("ALTER TABLE \"bank\".\"accounts_0\" {what}");
        Some(SchemaStep { what: Step::Alter { slot: 0, added }, query })
    }
}
